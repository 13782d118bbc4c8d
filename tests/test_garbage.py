"""The garbage collector is held back where many objects are made, and finds garbage among them later."""

import subprocess
import sys

import pytest

FEW_AND_MANY = """
for many in (True, False):
    gc.collect()
    with without_collector():
        rows = [[number] for number in range(20_000 if many else 100)]
        circle = Circle()
        circle.itself, alive = circle, weakref.ref(circle)
        del circle
    assert any(kept is rows[0] for kept in gc.get_objects(2)) == many
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.collect()
    assert alive() is None
"""
FROZEN = """
gc.freeze()
frozen = gc.get_freeze_count()
with without_collector():
    rows = [[number] for number in range(20_000)]
assert gc.isenabled() and gc.get_freeze_count() == frozen
gc.disable()
with without_collector():
    pass
assert not gc.isenabled()
"""


@pytest.mark.parametrize("code", [FEW_AND_MANY, FROZEN])
def test_many_new_objects_count_as_old_ones_and_what_a_program_has_set_stays(code):
    code = f"import gc, weakref\nfrom gputune.garbage import without_collector\nclass Circle: pass\n{code}"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
