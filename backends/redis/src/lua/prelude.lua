-- What every script begins with. The layout is described in the crate's documentation.
-- KEYS: 1 records (hash), 2 index (sorted set in byte order), 3 timers (sorted set, microseconds of this
-- server's clock). A script touches no other key, so a cluster refuses it as a whole or runs it as a whole.
-- Calls into the server and the making of functions and tables are what a script's time goes into: there are as
-- few as possible, and what is rarely needed is made only then.
local H, Z, T = KEYS[1], KEYS[2], KEYS[3]
local call = redis.call

local clock = call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])

local function number(n) return string.format('%.0f', n) end

-- A write that changes nothing: a server that was demoted, or cut off from its replicas by its own
-- settings, refuses here instead of answering from stale data. Every script either writes or does this. After
-- a script's first write the server no longer looks at its memory limit: done first, it lets renewals through.
local function guard() call('HDEL', H, '') end

-- One revision for everything that a script changes; the caller stores it. Never behind the clock, so that it
-- rises past a loss of data; below 2^53 until the year 2255, so that Lua's numbers hold it exactly.
local revision, stored
local function bump(last)
  if not revision then
    revision = math.max(tonumber(last or call('HGET', H, 'rev') or 0) + 1, now)
  end
  return revision
end
local function store()
  if revision and not stored then
    call('HSET', H, 'rev', number(revision))
    stored = true
  end
end

local channel = string.sub(H, 1, -2)
local function notify(target, payload)
  -- A refused PUBLISH must not stop a script half-way; watchers and waiters look again by the clock.
  redis.pcall('PUBLISH', channel .. target, payload)
end

local function drop_ticket(field, token)
  local cut = string.find(field, '\n', 1, true)
  local name = string.sub(field, cut + 1)
  call('HDEL', H, 'T:' .. field, 'P:' .. field)
  call('ZREM', Z, 'o:' .. string.sub(field, 1, cut) .. token .. '\n' .. name,
    'a:' .. string.match(name, '^[^-]*') .. '\nt' .. field)
  bump()
  local waiters = call('ZRANGEBYLEX', Z, '[w:' .. field .. '\n', '(w:' .. field .. '\v')
  for _, waiter in ipairs(waiters) do
    call('ZREM', Z, waiter)
    call('ZREM', T, waiter)
    notify('c:' .. string.sub(waiter, -16), 't' .. field)
  end
end

-- How keys go, and leases with all that stands on them; made where they are needed.
local changed, drop_key, end_lease, reap, tell

-- Whether a lease has ended: its record goes when it does.
local due = call('ZRANGEBYSCORE', T, '-inf', number(now), 'LIMIT', 0, 1)
