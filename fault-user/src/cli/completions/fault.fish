
# The command after `--` is completed as if it stood alone; rules, toxics, containers and interfaces are looked up.
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
function __fault_names
    fault completions --names $argv[1] --of "$argv[2]" 2>/dev/null
end
# The word that is typed is the one of this number, from 1 for `fault`, and follows these.
function __fault_word
    set -l words (commandline -opc)
    test (count $words) -eq (math $argv[1] - 1); and test "$words[2..3]" = "$argv[2..3]"
end
function __fault_attributes
    set -l words (commandline -opc)
    test (count $words) -gt 4; and test "$words[2..3]" = 'add toxic'; and __fault_names toxics $words[5]
end
complete -c fault -n __fault_has_command -f -a '(__fault_complete_command)'
complete -c fault -n 'not __fault_has_command' -l container -x -a '(__fault_names containers)'
complete -c fault -n 'not __fault_has_command' -s i -l interface -x -a '(__fault_names interfaces)'
complete -c fault -n 'not __fault_has_command' -s r -l rule -x -a '(__fault_names rules (commandline -ct))'
complete -c fault -n '__fault_word 4 add rule' -f -a '(__fault_names rules (commandline -ct))'
complete -c fault -n '__fault_word 5 add toxic' -f -a '(__fault_names toxics)'
complete -c fault -n __fault_attributes -f -a '(__fault_attributes)'
