from conformance.checks import copies
from conformance.suite.properties import as_test

test_deepcopy = as_test(copies.deepcopy)
test_hooked_copy = as_test(copies.hooked_copy)
test_pickled = as_test(copies.pickled)
test_state_dict = as_test(copies.state_dict)
test_cast = as_test(copies.cast)
