# Completion for fish; the program itself knows what can follow.
function __usb_qmp_hotplug_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l program $words[1]
    set -e words[1]
    for line in ($program complete fish -- $words $current 2>/dev/null)
        switch $line
            case :files
                set -l option (string match -r -- '^--[^=]*=' $current; or echo '')
                for path in (__fish_complete_path (string replace -- "$option" '' $current))
                    printf '%s\n' $option$path
                end
            case :directories
                __fish_complete_directories $current
            case '*'
                printf '%s\n' $line
        end
    end
end
complete -c usb-qmp-hotplug -f -a '(__usb_qmp_hotplug_complete)'
