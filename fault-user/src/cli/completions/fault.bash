
# The command after `--` is completed as if it stood alone; containers and interfaces are looked up.
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
        *)
            _fault "$@"
            return
            ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$("${COMP_WORDS[0]}" completions --names "$kind" 2>/dev/null)" -- "$word")
}
complete -F _fault_and_command -o bashdefault -o default fault
