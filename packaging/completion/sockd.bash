# bash completion for sockd, and for danted, whose options are the same but for the last two.

_sockd() {
    local current=$2 previous=$3
    COMPREPLY=()
    case $previous in
        -f | -p)
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            return
            ;;
        --chroot)
            mapfile -t COMPREPLY < <(compgen -d -- "$current")
            return
            ;;
        -N)
            mapfile -t COMPREPLY < <(compgen -W '1 2 4 8' -- "$current")
            return
            ;;
        -d)
            mapfile -t COMPREPLY < <(compgen -W '0 1 2' -- "$current")
            return
            ;;
        --add-user)
            return
            ;;
    esac
    mapfile -t COMPREPLY < <(
        compgen -W '-D -L -N -V -d -f -h -n -p -v --add-user --chroot' -- "$current"
    )
}

complete -o filenames -F _sockd sockd danted
