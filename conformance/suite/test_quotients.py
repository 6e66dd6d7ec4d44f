from conformance.checks import quotients
from conformance.suite.properties import as_test

test_quotients = as_test(quotients.quotients)
