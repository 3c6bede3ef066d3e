-- What every script begins with. The layout is described in the crate's documentation.
-- KEYS: 1 records (hash), 2 index (sorted set in byte order), 3 timers (sorted set, microseconds of this
-- server's clock). A script touches no other key, so a cluster refuses it as a whole or runs it as a whole.
local H, Z, T = KEYS[1], KEYS[2], KEYS[3]
local call = redis.call
local channel = string.sub(H, 1, -2)

-- A write that changes nothing: a server that was demoted, or cut off from its replicas by its own
-- settings, refuses here instead of answering from stale data. After a script's first write the server no
-- longer looks at its memory limit, so this write also decides that what adds data is refused there, and
-- renewals and releases never are.
if grows then call('HSETNX', H, 'rev', '0') else call('HDEL', H, '') end

local clock = call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])

local function number(n) return string.format('%.0f', n) end

-- One revision for everything that a script changes. Never behind the clock, so that it rises past a loss
-- of data; below 2^53 until the year 2255, so that Lua's numbers hold it exactly.
local revision
local function bump()
  if not revision then
    local last = tonumber(call('HGET', H, 'rev') or 0)
    revision = math.max(last + 1, now)
    call('HSET', H, 'rev', number(revision))
  end
  return revision
end
local function current()
  if revision then return revision end
  local last = call('HGET', H, 'rev')
  if last and last ~= '0' then return tonumber(last) end
  return bump()
end

-- Changes of keys, by directory, told to watchers at the end of the script in one message each.
local events = {}
local function changed(field, meta, value)
  local cut = string.find(field, '\n', 1, true)
  local dir = string.sub(field, 1, cut - 1)
  local list = events[dir]
  if not list then
    -- A directory has a 'D' record exactly while somebody watches it.
    local before = call('HGET', H, 'D:' .. dir)
    list = { before = before, n = 0 }
    events[dir] = list
  end
  list.n = list.n + 1
  -- More would only be cut off again below.
  if list.before and list.n <= 256 then
    list[list.n] = { string.sub(field, cut + 1), meta, value }
  end
end

local function notify(target, payload)
  -- A refused PUBLISH must not stop a script half-way; watchers and waiters look again by the clock.
  redis.pcall('PUBLISH', channel .. target, payload)
end

-- A key's meta: created (16 digits), modified (16 digits), lease.
local function drop_key(field, meta)
  call('HDEL', H, 'K:' .. field, 'V:' .. field)
  call('ZREM', Z, 'i:' .. field)
  local lease = string.sub(meta, 35)
  if lease ~= '' then call('ZREM', Z, 'a:' .. lease .. '\nk' .. field) end
  bump()
  changed(field)
end

local function drop_ticket(field)
  local token = call('HGET', H, 'T:' .. field)
  if not token then return end
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

local function end_lease(lease)
  call('ZREM', T, 'l:' .. lease)
  call('HDEL', H, 'L:' .. lease)
  local attached = call('ZRANGEBYLEX', Z, '[a:' .. lease .. '\n', '(a:' .. lease .. '\v')
  for _, member in ipairs(attached) do
    local field = string.sub(member, #lease + 5)
    if string.sub(member, #lease + 4, #lease + 4) == 'k' then
      local meta = call('HGET', H, 'K:' .. field)
      if meta then drop_key(field, meta) end
    else
      drop_ticket(field)
    end
    call('ZREM', Z, member)
  end
end

-- Ends every lease whose time has passed, before anything is looked at: nobody ever sees the records of a
-- dead lease, whenever the server gets round to it.
local function reap()
  local due = call('ZRANGEBYSCORE', T, '-inf', number(now), 'LIMIT', 0, 100)
  while #due > 0 do
    for _, timer in ipairs(due) do
      local kind, rest = string.sub(timer, 1, 2), string.sub(timer, 3)
      if kind == 'l:' then
        end_lease(rest)
      else
        call('ZREM', T, timer)
        if kind == 'w:' then
          call('ZREM', Z, timer)
        else
          call('HDEL', H, 'D:' .. rest)
          if events[rest] then events[rest].before = false end
        end
      end
    end
    due = call('ZRANGEBYSCORE', T, '-inf', number(now), 'LIMIT', 0, 100)
  end
end

local function alive(lease) return call('ZSCORE', T, 'l:' .. lease) end

local function remaining(lease)
  local deadline = alive(lease)
  if not deadline then return -1 end
  return math.max(tonumber(deadline) - now, 0)
end

-- Microseconds until the first timer of the namespace, or -1.
local function first_timer()
  local first = call('ZRANGEBYSCORE', T, '-inf', '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  if #first == 0 then return -1 end
  return math.max(tonumber(first[2]) - now, 0)
end

-- Makes every later change of the directory known on its channel, for a minute.
local function observe(dir)
  local at = call('HGET', H, 'D:' .. dir)
  if not at then
    -- A fresh number, so that whoever watched before sees that there is a gap.
    at = number(bump())
    call('HSET', H, 'D:' .. dir, at)
  end
  call('ZADD', T, number(now + 60000000), 's:' .. dir)
  return tonumber(at)
end

-- The nearest tickets ahead of (line, token, name), nearest first.
local function ahead(line, token, name, depth)
  local prefix = 'o:' .. line .. '\n'
  local members = call('ZREVRANGEBYLEX', Z, '(' .. prefix .. token .. '\n' .. name, '[' .. prefix, 'LIMIT', 0, depth)
  for i, member in ipairs(members) do members[i] = string.sub(member, #prefix + 18) end
  return members
end

local function tell()
  for dir, list in pairs(events) do
    if list.before then
      local parts = { number(revision), ' ', list.before, ' ', list.n > 256 and '-1' or number(list.n), '\n' }
      for i = 1, math.min(list.n, list.n > 256 and 0 or 256) do
        local name, meta, value = unpack(list[i], 1, 3)
        if meta then
          local lease = string.sub(meta, 35)
          parts[#parts + 1] = string.format('P %d %d %s %.0f %s\n', #name, #value > 65536 and -1 or #value,
            string.sub(meta, 1, 16), lease == '' and -1 or remaining(lease), lease)
          parts[#parts + 1] = name
          if #value <= 65536 then parts[#parts + 1] = value end
        else
          parts[#parts + 1] = string.format('D %d\n', #name)
          parts[#parts + 1] = name
        end
      end
      call('HSET', H, 'D:' .. dir, number(revision))
      notify('d:' .. dir, table.concat(parts))
    end
  end
end
