-- What every script begins with. The layout is described in the crate's documentation.
-- KEYS: 1 records (hash), 2 index (sorted set in byte order), 3 timers (sorted set, microseconds of this
-- server's clock). A script touches no other key, so a cluster refuses it as a whole or runs it as a whole.
-- Calls into the server and the making of functions and tables are what a script's time goes into: there are as
-- few as possible, and what is rarely needed is made only then.
local H, Z, T = KEYS[1], KEYS[2], KEYS[3]
local call = redis.call
local clock = call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])

-- One revision for everything that a script changes. Never behind the clock, so that it rises past a loss of
-- data; below 2^53 until the year 2255, so that Lua's numbers hold it exactly.
local revision, stored

-- Every script either writes or calls HDEL on the field '', which changes nothing: a server that was demoted,
-- or cut off from its replicas by its own settings, refuses that instead of answering from stale data. After a
-- script's first write the server no longer looks at its memory limit, so this also lets renewals through.

-- Something whose time has passed: then it goes before anything is looked at, and nobody ever sees the records
-- of a dead lease, whenever the server gets round to it.
local due = call('ZRANGEBYSCORE', T, '-inf', string.format('%.0f', now), 'LIMIT', 0, 1)
