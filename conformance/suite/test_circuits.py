from conformance.checks import circuits
from conformance.suite.properties import as_test

test_products = as_test(circuits.products)
test_composition = as_test(circuits.composition)
