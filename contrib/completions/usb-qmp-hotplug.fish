# Completion for fish; the program itself knows what can follow.
function __usb_qmp_hotplug_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l program $words[1]
    set -e words[1]
    for line in ($program complete fish -- $words $current 2>/dev/null)
        switch $line
            case \tfiles
                __fish_complete_path (string replace -r -- '^--[^=]*=' '' $current)
            case \tdirectories
                __fish_complete_directories $current
            case '*'
                printf '%s\n' $line
        end
    end
end
complete -c usb-qmp-hotplug -f -a '(__usb_qmp_hotplug_complete)'
