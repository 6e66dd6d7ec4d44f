from conformance.checks import beyond, forward
from conformance.suite.properties import as_test

test_logits = as_test(forward.logits)
test_loss = as_test(forward.loss)
test_patched_default = as_test(forward.patched_default)
test_patched_exact = as_test(forward.patched_exact)
test_patch_warning = as_test(forward.patch_warning)
test_long = as_test(beyond.long)
