from conformance.checks import shares
from conformance.suite.properties import as_test

test_norms = as_test(shares.norms)
test_logits = as_test(shares.logits)
test_stacked = as_test(shares.stacked)
