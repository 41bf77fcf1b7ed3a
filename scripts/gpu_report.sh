#!/usr/bin/env bash
# What a GPU gives: is it right, and how fast is it beside torch and sentence-transformers?
#
#     bash scripts/gpu_report.sh report                       # all parts, under 9 minutes on an H100
#     PARTS="correct train" bash scripts/gpu_report.sh report   # some of them
#
# Nothing is installed; it needs what `pip install -e '.[test,cuda]'` brings and torch for CUDA. Writes
# report/report.json and report/report.txt. A part that fails or takes longer than SECONDS_A_PART
# [150] is named, and the others go on. PYTHON is the interpreter [python].
set -euo pipefail
out=${1:?usage: bash scripts/gpu_report.sh FOLDER}
python=${PYTHON:-python}
cd "$(dirname "$0")/.."
mkdir -p "$out"
# torch and JAX take turns on one GPU: neither may keep it to itself.
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/programs}

declare -A command=(
    [correct]="benchmarks/correct.py"
    [train]="benchmarks/train_step.py --blocks 3 --steps 10"
    [train_no_dropout]="benchmarks/train_step.py --blocks 3 --steps 10 --dropout 0"
    [encode]="benchmarks/encode.py --texts 20000"
    [rank]="benchmarks/rank.py --queries 200 --rounds 3"
    [score]="benchmarks/score.py --pairs 1000 --rounds 2"
    [search]="benchmarks/search.py --keys 2000000 --rounds 3"
)
failed=0
{
    nvidia-smi --query-gpu=name,driver_version --format=csv || echo "no nvidia-smi here"
    git log -1 --format="commit %h, %cs" || true
} > "$out/report.txt" 2> /dev/null
for part in ${PARTS:-correct train train_no_dropout encode rank score search}; do
    [ -n "${command[$part]:-}" ] || { echo "error: no part $part: give some of ${!command[*]}" >&2; exit 2; }
    rm -f "$out/$part.json"
    echo "== $part: ${command[$part]}" | tee -a "$out/report.txt"
    code=0
    # shellcheck disable=SC2086
    timeout "${SECONDS_A_PART:-150}" "$python" ${command[$part]} ${ARGUMENTS:-} --json "$out/$part.json" \
        2> "$out/$part.err" | tee -a "$out/report.txt" || code=$?
    if [ "$code" != 0 ]; then
        failed=1
        echo "$part: exit $code, see $out/$part.err" | tee -a "$out/report.txt"
    fi
done
"$python" - "$out" << 'PYTHON'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
parts = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if p.stem != "report"}
(folder / "report.json").write_text(json.dumps(parts, indent=2) + "\n")
PYTHON
echo "$out/report.json, $out/report.txt"
exit $failed
