Feature: The user service outlives its stores

  Background:
    Given 'MySQL' is at tcp:3306
    And 'the Redis primary' is at tcp:6379
    And 'the Redis replica' is at tcp:6380
    And user 7 is "Ada"

  Scenario: Without MySQL the service is read-only
    When 'MySQL' is down
    Then the service is read-only
    And user 7 reads "Ada" from the cache
    And renaming user 7 is answered with 503
    And user 999 is answered with 503

  Scenario: With MySQL back, writes are restored
    Given 'MySQL' is down
    And renaming user 7 is answered with 503
    When 'MySQL' is up
    Then 'the service' recovers within 3s
    And user 7 becomes "Grace"

  Scenario: Cached names are read without the Redis primary
    When 'the Redis primary' is down
    Then user 7 reads "Ada" from the cache
    And the service is read-only
    When 'the Redis primary' is up
    Then 'the service' recovers within 3s
    And user 7 becomes "Grace"

  Scenario: Without any cache, names come from MySQL
    When 'the Redis primary' is down
    And 'the Redis replica' is down
    Then user 7 reads "Ada" from the database

  Scenario: A slow MySQL makes nothing fail
    When 'MySQL' is slow by 50ms
    Then user 7 becomes "Grace" after 200ms at the least
    When 'MySQL' is up
    Then 'the service' recovers within 3s

  Scenario: A MySQL that hangs does not hang the service
    When 'MySQL' times out
    Then renaming user 7 is answered with 503
    When 'MySQL' is up
    Then 'the service' recovers within 3s

  Scenario: A MySQL that resets its connections
    When 'MySQL' resets
    Then renaming user 7 is answered with 503
    And user 7 reads "Ada" from the cache
    When 'MySQL' is up
    Then 'the service' recovers within 3s
