# Completion of rspd(8) and its commands, rspd-status(1), for bash.

_rspd() {
    local word=$2 option=$3
    case $COMP_CWORD:${COMP_WORDS[1]} in
        1:*) ;;
        *:status | *:connections | *:top)
            _rspd_look "$1" "${COMP_WORDS[1]}"
            return
            ;;
    esac
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
            local commands=
            ((COMP_CWORD == 1)) && commands="status connections top upgrade"
            COMPREPLY=($(compgen -W "$commands -c --config -l --listen -b --backend --max-connections --log-level --exit-idle-time
                --foreground --pid-file --check --all -h --help -V --version" -- "$word"))
            [[ $word == [/.~]* ]] && compopt -o default # an address or a backend may be a file
            ;;
    esac
}

# A command that looks at a running rspd. $1: rspd, $2: the command.
_rspd_look() {
    local -a typed values=()
    # Words as they were typed: bash takes a : in an address for the end of a word.
    read -ra typed <<<"${COMP_LINE:0:COMP_POINT}"
    [[ ${COMP_LINE:0:COMP_POINT} == *' ' ]] && typed+=('')
    local word=${typed[-1]} option=${typed[-2]}
    if [[ $word == --*=* ]]; then
        option=${word%%=*}
        word=${word#*=}
    fi
    local options="--json --socket --instance -h --help"
    case $2 in
        status) options+=" --all --check" ;;
        connections) options+=" --proxy --client --backend --route --longer-than --idle-for --sort --limit" ;;
        top) options+=" --interval" ;;
    esac
    case $option in
        --socket)
            compopt -o default
            return
            ;;
        --instance)
            local socket
            for socket in /run/rspd-*/control.sock; do
                [[ -S $socket ]] && socket=${socket%/*} && values+=("${socket#/run/rspd-}")
            done
            ;;
        --proxy) mapfile -t values < <(_rspd_names "$1" proxies) ;;
        --backend) mapfile -t values < <(_rspd_names "$1" backends) ;;
        --route) mapfile -t values < <(_rspd_names "$1" routes) ;;
        --sort) values=(bytes age idle rate) ;;
        --limit) values=(all) ;;
        --client | --longer-than | --idle-for | --interval) ;;
        *) values=($options) ;;
    esac
    local value before=${word%"${word##*:}"}
    for value in "${values[@]}"; do
        [[ $value == "$word"* ]] && COMPREPLY+=("$(printf %q "${value#"$before"}")")
    done
}

# The names of what a running rspd has, one a line; none if it does not answer. $1: rspd, $2: proxies, backends or routes.
_rspd_names() {
    local -a whom=()
    local place
    for ((place = 2; place < ${#typed[@]} - 1; place++)); do
        case ${typed[place]} in
            --socket | --instance) whom=("${typed[@]:place:2}") ;;
            --socket=* | --instance=*) whom=("${typed[place]}") ;;
        esac
    done
    command "$1" status --json "${whom[@]}" 2>/dev/null | python3 -c '
import json, sys
print(*sorted({entry["name"] for entry in json.load(sys.stdin)[sys.argv[1]]} - {""}), sep="\n")
' "$2" 2>/dev/null
}

complete -F _rspd rspd
