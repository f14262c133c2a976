#!/bin/bash
# Check moma on a GPU, in stages of less than nine minutes each.
#
#   launch/gpu_check.sh                 # all: env tests layer throughput decode trace
#   launch/gpu_check.sh tests layer     # some of them
#
# A stage writes STAGE.json and STAGE.log into the folder $OUT (default: gpu_check). With TOY=1 all
# sizes are small, so that the stages also run on a CPU. The exit code is 1 if a stage failed.
set -euo pipefail

OUT=${OUT:-gpu_check}
SECONDS_PER_STAGE=530
STAGES=(env tests layer throughput decode trace)
recipe=configs/bench_data.toml

if [ -n "${TOY:-}" ]; then
  layer_sizes=(--dim 32 --tokens 64 --repeats 1 --eager)
  tables=("256 --only moe_4t4i")
  steps=(--repeats 1 --warm-up 1 pretrain.compile=false model.layers=2
    model.dim=32 model.heads=2 data.micro_batch_size=1)
  generation=(--row 256 --tokens 4 --repeats 1 --batch 1 model.layers=2 model.dim=32 model.heads=2
    codec.image_size=32 text_tokenizer.vocabulary_size=8192)
  small=(codec.image_size=32 data.sequence_length=512 text_tokenizer.vocabulary_size=8192
    text_tokenizer.max_documents=200 data.sources.0.count=20 data.sources.1.count=10
    data.sources.2.entries=300 pretrain.steps=4 pretrain.log_every=1)
else
  layer_sizes=(--dim 1024 --dim 2048 --tokens 24576 --dtype bf16)
  # Models that take turns on the GPU are moved to host memory and back: few at a time.
  tables=("90m" "435m --only moe_8x" "435m --only moe_4t4i" "435m --only mod_moe_4t4i")
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
from importlib.metadata import version
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps({
    "moma": version("moma"), "torch": torch.__version__, "python": platform.python_version(),
    "cuda": torch.version.cuda, "gpu": gpu and gpu.name, "memory": gpu and gpu.total_memory,
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

stage_layer() {
  moma bench layer "${layer_sizes[@]}" --json
}

stage_throughput() { # a file for each table, so that those before a failure are kept
  local table number=0
  for table in "${tables[@]}"; do
    number=$((number + 1))
    # shellcheck disable=SC2086  # a table is several arguments
    moma bench throughput --table2 --row $table "${steps[@]}" --json > "$OUT/table.partial"
    mv "$OUT/table.partial" "$OUT/throughput-$number.json"
  done
  python - "$OUT" << 'END'
import json, sys
from pathlib import Path
files = sorted(Path(sys.argv[1]).glob("throughput-*.json"))
print(json.dumps([json.loads(file.read_text()) for file in files]))
END
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
loaded = moma.load(sys.argv[1])
loaded.generate([["a red square"]], "text", new_tokens=8)
rows = []
for batch in (1, 8):
    start = time.perf_counter()
    loaded.generate([["a red square"]] * batch, "image")
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
  "stage_$2"
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
    python -m json.tool "$OUT/$stage.json" > /dev/null 2>&1 ||
      echo "{\"exit_code\": $code}" > "$OUT/$stage.json"
    failed=1
  fi
done
exit "$failed"
