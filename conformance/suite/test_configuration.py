from conformance.checks import configuration
from conformance.suite.properties import as_test

test_truth = as_test(configuration.truth)
test_live = as_test(configuration.live)
