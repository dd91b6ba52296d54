# Read by the scripts beside it; what they have in common.
#
#     bash run_bmtrain.sh [NAME=value ...] [--key value ...]
#
# NAME is one of those at the end of the script. A value written there comes first, then an argument, then a variable of
# the shell. --key value goes to `fm9g train`: `fm9g config keys` lists the keys. args["key"]="value" in the script is a
# default: the file of train_configs/ wins over it, as in the guide, and --key value wins over both.
# Everything happens in the folder of the script, which is called fm9g_SIZE: data/ is written there, and paths are
# relative to it.

NAMES="GPUS_PER_NODE NNODES RANK MASTER_ENDPOINT MASTER_PORT"
LAUNCH=$(readlink -f -- "${BASH_SOURCE[0]}")
declare -A args=() # keys of the run as the guide writes them

fail() {
    echo "$0: $1" >&2
    exit 2
}

# The folder is that of the script's name, symlinks and all; of `bash ../run_bmtrain.sh`, the one the user is in.
folder=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -L) || exit 2
case ${folder##*/} in fm9g_?*) ;; *) folder=$PWD ;; esac
cd -- "$folder" || exit 2
case ${folder##*/} in
fm9g_?*) size=${folder##*/fm9g_} ;;
*) fail "which size? Run it in a folder such as apps/fm9g_7b, or as apps/fm9g_7b/${0##*/}" ;;
esac

others=() given=() before=""
for word in "$@"; do
    # What follows --key is its value.
    if [[ $word == *=* && " $NAMES " == *" ${word%%=*} "* && ! $before =~ ^--[^=]+$ ]]; then
        declare "$word"
        given+=("${word%%=*}")
    else
        others+=("$word")
    fi
    before=$word
done
set -- "${others[@]}"

# The guide has a blank after one "=" (args["lora_layer"]= "..."), where for bash the assignment ends: it is made here.
blank_after_equals() {
    [[ $BASH_COMMAND =~ ^args\[ ]] || return 0
    if [[ $BASH_COMMAND =~ ^args\[[\"\']?([A-Za-z_]+)[\"\']?\]\ *=\ +([\"\']?)(.*)$ ]]; then
        local key=${BASH_REMATCH[1]} quote=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
        [[ ! $quote || $value == *"$quote" ]] && value=${value%"$quote"} || fail "cannot be read: $BASH_COMMAND"
        [[ $quote == "'" || $value != *[\$\`]* ]] || fail "write it without a blank after the =: $BASH_COMMAND"
        args[$key]=${value//\\\"/\"}
        return 1 # the command as bash reads it is left out
    fi
    [[ $BASH_COMMAND =~ ^args\[[^]]+\]\+?=[^\ ] || $BASH_COMMAND =~ ^args\[[^]]+\]=$ ]] && return 0
    fail "cannot be read: $BASH_COMMAND; write args[\"key\"]=\"value\""
}
shopt -s extdebug
trap blank_after_equals DEBUG

# train SUFFIX [--key value ...]: does not return. SUFFIX: of the name in train_configs/, after the size.
train() {
    local config=${args[config]:-$size} key name
    trap - DEBUG
    case $config in */* | *.json) ;; *) config=${config%"$1"}$1 ;; esac
    shift
    # A number of processes that was read from args is a default, too.
    [[ ${args[n_gpus]:-} && $GPUS_PER_NODE == "${args[n_gpus]}" && " ${given[*]} " != *" GPUS_PER_NODE "* ]] &&
        GPUS_PER_NODE=
    [[ ${args[load]:-} ]] && args[pretrained_model]=${args[load]} # the guide has both names
    unset "args[config]" "args[load]"
    for key in "${!args[@]}"; do
        set -- "--default.$key" "${args[$key]}" "$@"
    done
    for name in $NAMES; do
        if [[ ${!name} ]]; then export "${name?}"; else unset "$name"; fi
    done
    if ! command -v fm9g >/dev/null; then
        export PYTHONPATH="${LAUNCH%/*/*}${PYTHONPATH:+:$PYTHONPATH}"
        python3 -c 'import importlib.util as i; exit(not (i.find_spec("fm9g") and i.find_spec("torch")))' 2>/dev/null ||
            fail "fm9g is not on PATH, and python3 has no torch: activate the environment it is installed in"
        exec python3 -m fm9g train --config "$config" "$@"
    fi
    exec fm9g train --config "$config" "$@"
}
