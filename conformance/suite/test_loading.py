from conformance.checks import loading
from conformance.suite.properties import as_test

test_by_name = as_test(loading.by_name)
test_refusal = as_test(loading.refusal)
