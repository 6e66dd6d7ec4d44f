from conformance.checks import components, wiring
from conformance.suite.properties import as_test

test_alone = as_test(components.alone)
test_attention = as_test(components.attention)
test_block = as_test(components.block)
test_lookup = as_test(wiring.lookup)
test_wiring = as_test(wiring.wiring)
