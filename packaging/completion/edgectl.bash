# bash completion for edgectl; printed by `edgectl completion bash`.
_edgectl() {
    local cur prev command word i
    COMPREPLY=()
    cur="${COMP_WORDS[COMP_CWORD]}"
    prev="${COMP_WORDS[COMP_CWORD-1]}"
    command=""
    for ((i = 1; i < COMP_CWORD; i++)); do
        word="${COMP_WORDS[i]}"
        case "$word" in
            put|wait|status|models|stats|devices|watch|load|unload|infer|bench|tune|operators|doctor|explain|top|logs|support-bundle|completion) command="$word"; break ;;
        esac
    done
    case "$command:$prev" in
        put:--models) mapfile -t COMPREPLY < <(compgen -d -- "$cur"); return ;;
        put:--settings) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
        infer:--npz) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
        bench:--onnx) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
        tune:--aim) mapfile -t COMPREPLY < <(compgen -W "latency throughput" -- "$cur"); return ;;
        operators:--state-dir) mapfile -t COMPREPLY < <(compgen -d -- "$cur"); return ;;
        top:--sort) mapfile -t COMPREPLY < <(compgen -W "requests latency memory name" -- "$cur"); return ;;
        *:--endpoint|*:--timeout|*:--name|*:--sha256|*:--count|*:--topic|*:-i|*:--input|*:--image-scale|*:--model-version|*:-o|*:--output|*:--seconds|*:--clients|*:--rate|*:--shape|*:--budget|*:--reference|*:--candidate|*:--only|*:--unit|*:--interval|*:-n|*:--lines|*:--since) COMPREPLY=(); return ;;
    esac
    if [[ -z "$command" ]]; then
        mapfile -t COMPREPLY < <(compgen -W "put wait status models stats devices watch load unload infer bench tune operators doctor explain top logs support-bundle completion -h --help --version --json --endpoint" -- "$cur")
        return
    fi
    if [[ "$cur" == -* ]]; then
        case "$command" in
            put) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout --name --models --settings --no-settings --wait" -- "$cur") ;;
            wait) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout --sha256" -- "$cur") ;;
            status) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout" -- "$cur") ;;
            models) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout --names" -- "$cur") ;;
            stats) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout" -- "$cur") ;;
            devices) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout" -- "$cur") ;;
            watch) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout --count --topic" -- "$cur") ;;
            load) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout" -- "$cur") ;;
            unload) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout" -- "$cur") ;;
            infer) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout -i --input --image-scale --model-version -o --output --npz" -- "$cur") ;;
            bench) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout -i --input --image-scale --model-version --seconds --clients --rate --shape --onnx --no-bare" -- "$cur") ;;
            tune) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout -i --input --image-scale --shape --aim --budget --yes --accept-unproven --export" -- "$cur") ;;
            operators) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout --reference --candidate --only --state-dir" -- "$cur") ;;
            doctor) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout --all --unit" -- "$cur") ;;
            explain) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout" -- "$cur") ;;
            top) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout --once --interval --sort" -- "$cur") ;;
            logs) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout -f --follow -n --lines --since -x --explain --unit" -- "$cur") ;;
            support-bundle) mapfile -t COMPREPLY < <(compgen -W "-h --help --json --endpoint --timeout --unit" -- "$cur") ;;
            completion) mapfile -t COMPREPLY < <(compgen -W "-h --help" -- "$cur") ;;
        esac
        return
    fi
    case "$command" in
        put) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
        wait) mapfile -t COMPREPLY < <(compgen -W "$(_edgectl_models)" -- "$cur") ;;
        stats) mapfile -t COMPREPLY < <(compgen -W "$(_edgectl_models)" -- "$cur") ;;
        load) mapfile -t COMPREPLY < <(compgen -W "$(_edgectl_models)" -- "$cur") ;;
        unload) mapfile -t COMPREPLY < <(compgen -W "$(_edgectl_models)" -- "$cur") ;;
        infer) mapfile -t COMPREPLY < <(compgen -W "$(_edgectl_models)" -- "$cur") ;;
        bench) mapfile -t COMPREPLY < <(compgen -W "$(_edgectl_models)" -- "$cur") ;;
        tune) mapfile -t COMPREPLY < <(compgen -W "$(_edgectl_models)" -- "$cur") ;;
        explain) mapfile -t COMPREPLY < <(compgen -W "$(_edgectl_models)" -- "$cur") ;;
        logs) mapfile -t COMPREPLY < <(compgen -W "$(_edgectl_models)" -- "$cur") ;;
        support-bundle) mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
        completion) mapfile -t COMPREPLY < <(compgen -W "bash zsh" -- "$cur") ;;
    esac
}
_edgectl_models() {
    edgectl models --names --timeout 1 2>/dev/null
}
complete -F _edgectl edgectl
