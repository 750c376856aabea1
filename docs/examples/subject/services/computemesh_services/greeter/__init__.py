"""greeter: greets people. Runs anywhere, any number of times, on port 8199.

Owns
    How many greetings it said in this life. Nothing is stored.

Answers
    ``compute.greetings.greet.v1`` with a ``Greeting``.

Publishes
    ``compute.greetings.greeted.v1`` after each.

Promises
    - A greeting is answered whether or not anybody hears of it.
"""
