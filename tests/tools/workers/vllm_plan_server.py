"""Run by vLLM's Python: a planner that has imported vLLM already, for many plans. `python vllm_plan_server.py PLANNER`.

Each line of stdin names a folder, whose plan is made in a fork; the answer is the fork's exit code. The platform is a
GPU of compute capability 9.0.
"""

import importlib.util
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from engine_platform import stub_platform

stub_platform({"platform": "cuda", "capability": [9, 0], "tp": 64, "pp": 1})
import vllm.engine.arg_utils  # noqa: E402
import vllm.model_executor.layers.fused_moe  # noqa: E402
import vllm.model_executor.model_loader.utils  # noqa: E402
import vllm.model_executor.models.llama  # noqa: E402, F401

spec = importlib.util.spec_from_file_location("planner", f"{sys.argv[1]}/__main__.py")
assert spec is not None
planner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(planner)
planner.stub_platform = lambda request: None
answers = os.dup(1)
os.dup2(2, 1)
for line in sys.stdin:
    folder = line.strip()
    child = os.fork()
    if child == 0:
        said = os.open(f"{folder}/said", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.chdir(folder)
        code = 0
        try:
            planner.main(Path(folder))
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(status))
