# Completion for bash, 4.4 or newer; the program itself knows what can follow.
_usb_qmp_hotplug() {
    local value help
    local -a values=() shown=()
    while IFS=$'\t' read -r value help; do
        case $value:$help in
            :files:) compopt -o default 2>/dev/null ;;
            :directories:) compopt -o dirnames 2>/dev/null ;;
            *)
                printf -v value %q "$value"
                values+=("$value")
                shown+=("$value${help:+  ($help)}")
                ;;
        esac
    done < <("${1/#\~/$HOME}" complete bash -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
    compopt -o nosort 2>/dev/null
    # What only is listed (9, 33, 63: complete -F in bash(1), COMP_TYPE) may say more.
    if [[ ${#values[@]} -gt 1 && $COMP_TYPE =~ ^(9|33|63)$ ]]; then
        COMPREPLY=("${shown[@]}")
    else
        COMPREPLY=("${values[@]}")
    fi
    # An option's value follows at once.
    [[ ${#values[@]} != 1 || ${values[0]} != *= ]] || compopt -o nospace 2>/dev/null
}
complete -F _usb_qmp_hotplug usb-qmp-hotplug
