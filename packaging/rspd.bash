# Completion of rspd(8) for bash.

_rspd() {
    local word=$2 option=$3
    # In --option=VALUE the = stands as a word of its own.
    if [[ $word == = ]]; then
        word=
    elif [[ $option == = ]]; then
        option=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    case $option in
        -c | --config | -l | --listen | -b | --backend | --pid-file)
            compopt -o default # files; an address may be one
            ;;
        --log-level)
            COMPREPLY=($(compgen -W "debug info warning error" -- "$word"))
            ;;
        --max-connections | --exit-idle-time) ;;
        *)
            COMPREPLY=($(compgen -W "-c --config -l --listen -b --backend --max-connections --exit-idle-time
                --log-level --pid-file --foreground --check -h --help --version" -- "$word"))
            ;;
    esac
}

complete -F _rspd rspd
