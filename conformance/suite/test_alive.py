from conformance.checks import alive
from conformance.suite.properties import as_test

test_advertised = as_test(alive.advertised)
test_output_attentions = as_test(alive.output_attentions)
test_hidden_states = as_test(alive.hidden_states)
