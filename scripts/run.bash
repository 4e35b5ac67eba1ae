# Sourced by scripts/bench and scripts/proof; expects the checkout's directory in `root`.

# Runs the program NAME of a package below scripts/, or lists what there is.
run() { # package [name arguments…]
    local package=$1 name=${2:-} program
    if [[ -z $name || ! -f $root/scripts/$package/${name//-/_}.py ]]; then
        [[ -z $name || $name == -* ]] || printf 'there is no %s in scripts/%s; there are:\n' "$name" "$package" >&2
        for program in "$root/scripts/$package"/*.py; do
            name=$(basename "$program" .py)
            printf '  %-16s %s\n' "${name//_/-}" "$(sed -n '1s/^"""//;1s/"""$//;1p' "$program")" >&2
        done
        exit 2
    fi
    shift 2
    "$root/scripts/setup"
    PYTHONPATH=$root/scripts:$root exec "$root/.venv/bin/python" -m "$package.${name//-/_}" "$@"
}
