/* A program for a udev rule that does nothing but note when it began to run. */
#include <fcntl.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    char line[32];
    struct timespec now;
    int file;
    clock_gettime(CLOCK_MONOTONIC, &now);
    file = argc == 2 ? open(argv[1], O_WRONLY | O_APPEND) : -1;
    return write(file, line, sprintf(line, "%ld%09ld\n", (long)now.tv_sec, now.tv_nsec)) < 0;
}
