# Sourced by the other scripts: `attend COMMAND …` runs a command and returns its exit code. It is waited for in the
# background, so that the script hears Ctrl-C and SIGTERM at once; it passes them on, and the command says what is kept.
# The script ends with exit code 130 or 143.
child=
attend() {
    local code=0
    "$@" &
    child=$!
    wait "$child" || code=$?
    child=
    return "$code"
}
end_with() {
    trap '' INT TERM
    # In the background commands are deaf to Ctrl-C. What bash itself says of an ended child is nobody's business.
    { [[ -z $child ]] || { kill -TERM "$child"; wait "$child"; }; } 2> /dev/null || true
    exit "$1"
}
trap 'end_with 130' INT
trap 'end_with 143' TERM
