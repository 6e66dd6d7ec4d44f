from conformance.checks import patch, patch_ducks, patching
from conformance.suite.properties import as_test

test_life = as_test(patch.life)
test_strange = as_test(patch.strange)
test_no_clip = as_test(patching.no_clip)
test_modes = as_test(patching.modes)
test_threads = as_test(patching.threads)
test_duck_typed = as_test(patch_ducks.duck_typed)
