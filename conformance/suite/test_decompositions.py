from conformance.checks import decompositions
from conformance.suite.properties import as_test

test_components = as_test(decompositions.components)
test_heads = as_test(decompositions.heads)
test_neurons = as_test(decompositions.neurons)
test_full = as_test(decompositions.full)
