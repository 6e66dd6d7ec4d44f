from conformance.checks import derivatives, transforms
from conformance.suite.properties import as_test

test_second = as_test(derivatives.second)
test_transformed = as_test(transforms.transformed)
