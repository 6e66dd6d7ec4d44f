from conformance.checks import weights
from conformance.suite.properties import as_test

test_read_right = as_test(weights.read_right)
test_live = as_test(weights.live)
