from conformance.checks import modes
from conformance.suite.properties import as_test

test_reach = as_test(modes.reach)
test_dropout = as_test(modes.dropout)
test_checkpointing = as_test(modes.checkpointing)
test_autocast = as_test(modes.autocast)
test_inference = as_test(modes.inference)
