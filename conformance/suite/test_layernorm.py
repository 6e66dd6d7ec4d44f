from conformance.checks import layernorm
from conformance.suite.properties import as_test

test_observed = as_test(layernorm.observed)
test_edited = as_test(layernorm.edited)
test_second_derivatives = as_test(layernorm.second_derivatives)
test_incl_bwd = as_test(layernorm.incl_bwd)
