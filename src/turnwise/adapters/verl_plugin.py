"""The entry point of verl's group `verl.plugins`: importing it puts our estimators into verl's registry.

verl imports it at the end of `import verl`, on every node and in every process of Ray, and swallows what goes wrong;
`turnwise doctor verl` says it.
"""

from turnwise.adapters.verl import register

REGISTERED = register()
