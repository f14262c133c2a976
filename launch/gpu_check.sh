#!/bin/bash
# Check moma on a GPU, in stages of less than nine minutes each.
#
#   launch/gpu_check.sh                 # all: env tests layer throughput decode trace
#   launch/gpu_check.sh tests layer     # some of them
#
# A stage writes STAGE.json and STAGE.log into the folder $OUT (default: gpu_check). One that ran
# out of time goes on after its last part when the same code is run again. With TOY=1 all sizes are
# small, so that the stages also run on a CPU. The exit code is 1 if a stage failed.
set -euo pipefail

OUT=${OUT:-gpu_check}
SECONDS_PER_STAGE=530
STAGES=(env tests layer throughput decode trace)
recipe=configs/bench_data.toml

if [ -n "${TOY:-}" ]; then
  widths=(32 64)
  layer_sizes=(--tokens 64 --repeats 1 --eager)
  tables=("256 --only moe_4t4i")
  steps=(--repeats 1 --warm-up 1 pretrain.compile=false model.layers=2
    model.dim=32 model.heads=2 data.micro_batch_size=1)
  generation=(--row 256 --tokens 4 --repeats 1 --batch 1 model.layers=2 model.dim=32 model.heads=2
    codec.image_size=32 text_tokenizer.vocabulary_size=8192)
  small=(codec.image_size=32 data.sequence_length=512 text_tokenizer.vocabulary_size=8192
    text_tokenizer.max_documents=200 data.sources.0.count=20 data.sources.1.count=10
    data.sources.2.entries=300 pretrain.steps=4 pretrain.log_every=1)
else
  widths=(1024 2048)
  layer_sizes=(--tokens 24576 --dtype bf16)
  # Models that take turns on the GPU are moved to host memory and back: few at a time.
  tables=("90m --only moe_8x --only moe_4t4i" "90m --only mod_moe_4t4i"
    "435m --only moe_8x" "435m --only moe_4t4i" "435m --only mod_moe_4t4i"
    "435m --only moe_4t4i model.experts_implementation=triton")
  generation=(--row 435m --dtype bf16 --repeats 1 codec.image_size=256)  # 256 codes
  steps=(--repeats 3 data.sequence_length=4096 data.micro_batch_size=2)
  small=(model.dim=1024 model.heads=16 model.layers=12 pretrain.compile=true pretrain.steps=30
    pretrain.log_every=1)
fi
small+=("data.path=$OUT/data")

# The stages: JSON goes to standard output, all else to standard error.

stage_env() {
  python - << 'END'
import json, platform, torch
from importlib.metadata import PackageNotFoundError, version
def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps({
    "moma": version("moma"), "torch": torch.__version__, "python": platform.python_version(),
    "cuda": torch.version.cuda, "triton": installed("triton"), "torchao": installed("torchao"),
    "gpu": gpu and gpu.name, "memory": gpu and gpu.total_memory,
    "capability": gpu and [gpu.major, gpu.minor],
}))
END
  if command -v nvidia-smi > /dev/null; then nvidia-smi >&2; fi
}

stage_tests() {
  local code=0
  # Triton compiles kernels here, also where tests would not notice the GPU.
  TRITON_INTERPRET=0 python -m pytest -q -m gpu --junitxml="$OUT/tests.xml" tests >&2 || code=$?
  python - "$OUT/tests.xml" << 'END'
import json, sys
from xml.etree import ElementTree
suite = ElementTree.parse(sys.argv[1]).find("testsuite")
names = ("tests", "failures", "errors", "skipped")
print(json.dumps({name: int(suite.get(name)) for name in names} | {"seconds": float(suite.get("time"))}))
END
  return "$code"
}

# A part is of one state of the code and one command: others are measured anew.
version=$(find moma configs launch -type f -not -name '*.pyc' | sort | xargs sha256sum | sha256sum)
parts=()

part() { # a part of a stage, unless an earlier call has finished it: command
  local key file
  key=$(echo "$version $*" | sha256sum | head -c 16)
  file="$OUT/parts/$stage-$key.json"
  parts+=("$file")
  mkdir -p "$OUT/parts"
  [ -s "$file" ] || { "$@" > "$OUT/parts/unfinished" && mv "$OUT/parts/unfinished" "$file"; }
}

joined_parts() { # as a list; the next call of the stage measures all of them anew
  python - "${parts[@]}" << 'END'
import json, sys
from pathlib import Path
print(json.dumps([json.loads(Path(file).read_text()) for file in sys.argv[1:]]))
END
  rm "$OUT/parts/$stage"-*.json
}

stage_layer() {
  local width
  for width in "${widths[@]}"; do
    part moma bench layer --dim "$width" "${layer_sizes[@]}" --json
  done
  joined_parts
}

stage_throughput() {
  local table
  for table in "${tables[@]}"; do
    # shellcheck disable=SC2086  # a table is several arguments
    part moma bench throughput --table2 --row $table "${steps[@]}" --json
  done
  joined_parts
}

train_small() { # run, and further changes to the recipe
  moma prepare "$recipe" "${small[@]}" >&2
  moma train "$recipe" "${small[@]}" run="$1" "${@:2}" >&2
}

stage_decode() {
  train_small "$OUT/run" model.groups=moe_1t1i # without routers, it can generate at once
  moma bench generate "${generation[@]}" --json > "$OUT/generation.json"
  python - "$OUT/run" "$OUT/generation.json" << 'END'
import json, sys, time, moma
from pathlib import Path
from moma.generate.settings import Settings
loaded = moma.load(sys.argv[1])
loaded.generate([["a red square"]], Settings("text", new_tokens=8))
rows = []
for batch in (1, 8):
    start = time.perf_counter()
    loaded.generate([["a red square"]] * batch, Settings("image"))
    seconds, tokens = time.perf_counter() - start, batch * loaded.model.vocabulary.codes_per_image
    rows.append({"mode": "image", "batch": batch, "seconds": seconds, "tokens_per_second": tokens / seconds})
print(json.dumps({"run": rows, "bench": json.loads(Path(sys.argv[2]).read_text())}))
END
}

stage_trace() {
  train_small "$OUT/traced" engine.trace=2
  python - "$OUT/traced" << 'END'
import json, sys
from pathlib import Path
run = Path(sys.argv[1])
traces = sorted(path.name for path in (run / "trace").iterdir())
last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
assert traces, "no trace was written"
print(json.dumps({"traces": traces, "last_record": last}))
END
}

if [ "${1:-}" = --run ]; then
  stage=$2
  "stage_$stage"
  exit
fi

[ $# -gt 0 ] || set -- "${STAGES[@]}"
for stage in "$@"; do
  if [[ " ${STAGES[*]} " != *" $stage "* ]]; then
    echo "no stage '$stage'; use ${STAGES[*]}" >&2
    exit 2
  fi
done
if [ -z "${TOY:-}" ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "PyTorch sees no GPU here; set TOY=1 to run the stages at toy size" >&2
  exit 2
fi
mkdir -p "$OUT"
failed=0
for stage in "$@"; do
  start=$SECONDS code=0
  OUT=$OUT timeout "$SECONDS_PER_STAGE" bash "$0" --run "$stage" \
    > "$OUT/$stage.json" 2> "$OUT/$stage.log" || code=$?
  if [ "$code" -eq 0 ]; then
    echo "$stage: done in $((SECONDS - start)) s"
  else
    echo "$stage: failed with exit code $code; see $OUT/$stage.log" >&2
    [ "$code" -ne 124 ] || echo "$stage: ran out of time; run it again to go on" >&2
    python -m json.tool "$OUT/$stage.json" > /dev/null 2>&1 ||
      echo "{\"exit_code\": $code}" > "$OUT/$stage.json"
    failed=1
  fi
done
exit "$failed"
