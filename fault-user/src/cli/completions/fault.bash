
# The command after `--` is completed as if it stood alone; rules, toxics, containers and interfaces are looked up.
_fault_and_command() {
    local word=${COMP_WORDS[COMP_CWORD]} option=${COMP_WORDS[COMP_CWORD - 1]} index kind
    for ((index = 1; index < COMP_CWORD; index++)); do
        [[ ${COMP_WORDS[index]} == -- ]] || continue
        if declare -F _command_offset >/dev/null; then
            # From the package bash-completion.
            _command_offset $((index + 1))
        elif ((COMP_CWORD == index + 1)); then
            mapfile -t COMPREPLY < <(compgen -c -- "$word")
        else
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$word")
        fi
        return
    done
    # `--container=NAME` is three words.
    if [[ $word == = ]]; then
        word=
    elif [[ $option == = ]]; then
        option=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    case $option in
        --container) kind=containers ;;
        -i | --interface) kind=interfaces ;;
    esac
    case "$option ${COMP_WORDS[1]} ${COMP_WORDS[2]}" in
        -r\ * | --rule\ * | rule\ add\ rule)
            # A rule has spaces and is quoted; without the quote bash takes each of its words by itself.
            if [[ $word == [\'\"]* ]]; then
                compopt -o nospace
                mapfile -t COMPREPLY < <(_fault_names rules "$word")
                # A rule may go on: behind the only word bash would close the quote.
                ((${#COMPREPLY[@]} == 1)) && COMPREPLY+=("${COMPREPLY[0]} ")
                return
            fi
            ;;
        *\ add\ toxic)
            if ((COMP_CWORD == 4)); then
                kind=toxics
            elif ((COMP_CWORD > 4)) && [[ $word != -* && $option != -* ]]; then
                compopt -o nospace
                mapfile -t COMPREPLY < <(compgen -W "$(_fault_names toxics "${COMP_WORDS[4]}")" -- "$word")
                return
            fi
            ;;
    esac
    if [[ -z $kind || $word == -* ]]; then
        _fault "$@"
        return
    fi
    mapfile -t COMPREPLY < <(compgen -W "$(_fault_names "$kind")" -- "$word")
}
_fault_names() {
    "${COMP_WORDS[0]}" completions --names "$1" --of "${2-}" 2>/dev/null | cut -f 1
}
complete -F _fault_and_command -o bashdefault -o default fault
