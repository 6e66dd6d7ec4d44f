from conformance.checks import attributions
from conformance.suite.properties import as_test

test_norms = as_test(attributions.norms)
test_logits = as_test(attributions.logits)
test_stacked = as_test(attributions.stacked)
