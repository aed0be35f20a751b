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
        -c | --config)
            compopt -o filenames
            # A name a line: they may have blanks. Two patterns, since one for both needs extglob.
            mapfile -t COMPREPLY < <(
                compgen -f -X '!*.yaml' -- "$word"
                compgen -f -X '!*.yml' -- "$word"
                compgen -d -- "$word"
            )
            ;;
        -l | --listen | -b | --backend | --pid-file)
            compopt -o default # files; an address may be one
            ;;
        --max-connections | --exit-idle-time) ;;
        --log-level)
            COMPREPLY=($(compgen -W "debug info warning error" -- "$word"))
            ;;
        upgrade)
            COMPREPLY=($(compgen -W "--pid-file $(pgrep -x rspd)" -- "$word"))
            ;;
        *)
            COMPREPLY=($(compgen -W "upgrade -c --config -l --listen -b --backend --max-connections --log-level --exit-idle-time
                --foreground --pid-file --check --all -h --help -V --version" -- "$word"))
            [[ $word == [/.~]* ]] && compopt -o default # an address or a backend may be a file
            ;;
    esac
}

complete -F _rspd rspd
