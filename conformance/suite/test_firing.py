from conformance.checks import firing, gates, recomputed
from conformance.suite.properties import as_test

test_names = as_test(firing.names)
test_reverse = as_test(firing.reverse)
test_returned_gradients = as_test(firing.returned_gradients)
test_recomputed = as_test(recomputed.recomputed)
test_gated = as_test(gates.gated)
test_refused = as_test(gates.refused)
