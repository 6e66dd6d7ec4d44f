from conformance.checks import copies, hooked_copies
from conformance.suite.properties import as_test

test_deepcopy = as_test(copies.deepcopy)
test_hooked = as_test(hooked_copies.hooked)
test_pickled = as_test(copies.pickled)
test_state_dict = as_test(copies.state_dict)
test_cast = as_test(copies.cast)
