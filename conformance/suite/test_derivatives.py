from conformance.checks import derivatives
from conformance.suite.properties import as_test

test_second = as_test(derivatives.second)
test_transformed = as_test(derivatives.transformed)
