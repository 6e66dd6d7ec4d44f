from conformance.checks import returns
from conformance.suite.properties import as_test

test_kinds = as_test(returns.kinds)
test_labels = as_test(returns.labels)
