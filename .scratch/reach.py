import sys, warnings, time, re

sys.path[:0] = ["tests", "tests/modules"]
import torch

torch.set_num_threads(1)
warnings.simplefilter("ignore")
import gputune.engine.members as M

M.build_kernels = lambda bodies, dtype: None
import importlib.util

spec = importlib.util.spec_from_file_location("t", "tests/modules/test_operations.py")
t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
from operations import OPERATIONS

pattern = sys.argv[1] if len(sys.argv) > 1 else ""
count = {}
for name, op in OPERATIONS.items():
    if not re.search(pattern, name):
        continue
    begin = time.process_time()
    self = t.Trained.__new__(t.Trained)
    self.operation = op
    try:
        self.data = t.data_of(op)
        self.configs = t.configs_of(op)
        self.traits = t.traits_of(op.build, self.configs[0], self.data, objective=op.objective)
        if self.traits.unstackable:
            way, reason = "loop", self.traits.unstackable
        else:
            try:
                chunk = self.chunk(t.StackedModule, t.MemberChunk)
                way, reason = "compiled", ""
                if chunk.members[0].outputs is None:
                    reason = "no outputs"
            except t.TraceError as e:
                way, reason = "recorded", str(e)
    except Exception as e:
        way, reason = "ERROR", f"{type(e).__name__} {e}"
    count[way] = count.get(way, 0) + 1
    if way != op.backend or (way != "compiled"):
        print(
            f"{name:42} {way:9} (table {op.backend}) {reason[:150]}  {time.process_time() - begin:.2f}s",
            flush=True,
        )
print(count)
