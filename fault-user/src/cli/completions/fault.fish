
# The command after `--` is completed as if it stood alone; containers and interfaces are looked up.
function __fault_has_command
    contains -- -- (commandline -opc)
end
function __fault_complete_command
    set -l words (commandline -opc)
    set -l start (math (contains -i -- -- $words) + 1)
    set -l before
    if test $start -le (count $words)
        set before (string escape -- $words[$start..-1])
    end
    complete -C (string join ' ' -- $before (commandline -ct))
end
complete -c fault -n __fault_has_command -f -a '(__fault_complete_command)'
complete -c fault -n 'not __fault_has_command' -l container -x -a '(fault completions --names containers 2>/dev/null)'
complete -c fault -n 'not __fault_has_command' -s i -l interface -x -a '(fault completions --names interfaces 2>/dev/null)'
