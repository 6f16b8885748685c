/* The least that `udev VM` can do at a remove of what is not attached: the same words with QEMU. */
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static const char commands[] =
    "{\"execute\":\"qmp_capabilities\",\"id\":0}\n"
    "{\"execute\":\"device_del\",\"arguments\":{\"id\":\"usb-host-1-1\"},\"id\":1}\n"
    "{\"execute\":\"remove-fd\",\"arguments\":{\"fdset-id\":1},\"id\":2}\n";

static int read_lines(int monitor, int lines)
{
    char bytes[8192];
    while (lines > 0) {
        ssize_t count = read(monitor, bytes, sizeof bytes);
        if (count <= 0)
            return 1;
        for (ssize_t i = 0; i < count; i++)
            lines -= bytes[i] == '\n';
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int monitor = socket(AF_UNIX, SOCK_STREAM, 0);
    if (argc != 2)
        return 2;
    strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
    if (connect(monitor, (struct sockaddr *)&address, sizeof address) || read_lines(monitor, 1))
        return 1;
    if (write(monitor, commands, sizeof commands - 1) != sizeof commands - 1)
        return 1;
    return read_lines(monitor, 3);
}
