# Rules, toxics, containers and interfaces are looked up.
_fault_containers() {
    _fault_names containers
}
_fault_interfaces() {
    _fault_names interfaces
}
# A rule may go on, so neither a space nor the closing quote follows.
_fault_rules() {
    _fault_names rules "$PREFIX" -S ''
}
_fault_toxics() {
    _fault_names toxics
}
_fault_attributes() {
    _fault_names toxics "$line[2]" -S ''
}
_fault_names() {
    local -a lines names shown
    lines=(${(f)"$(_call_program names fault completions --names $1 --of ${(q)2})"})
    names=(${lines%%$'\t'*})
    shown=(${lines/$'\t'/  -- })
    compadd "${@:3}" -d shown -a names
}
