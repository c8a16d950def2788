# Containers and interfaces are looked up.
_fault_containers() {
    local -a names
    names=(${(f)"$(_call_program names fault completions --names containers)"})
    _describe -t containers container names
}
_fault_interfaces() {
    local -a names
    names=(${(f)"$(_call_program names fault completions --names interfaces)"})
    _describe -t interfaces interface names
}
