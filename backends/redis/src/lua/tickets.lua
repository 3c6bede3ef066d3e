local channel = string.sub(H, 1, -2)

local function notify(target, payload)
  -- A refused PUBLISH must not stop a script half-way; watchers and waiters look again by the clock.
  redis.pcall('PUBLISH', channel .. target, payload)
end

-- `waiters` are the names of the clients that wait for it, if any.
local function drop_ticket(field, token, waiters)
  local cut = string.find(field, '\n', 1, true)
  local name = string.sub(field, cut + 1)
  call('HDEL', H, 'T:' .. field, 'P:' .. field, 'W:' .. field)
  call('ZREM', Z, 'o:' .. string.sub(field, 1, cut) .. token .. '\n' .. name,
    'a:' .. string.match(name, '^[^-]*') .. '\nt' .. field)
  bump()
  for client in string.gmatch(waiters or '', '%x+') do
    call('ZREM', T, 'w:' .. field .. '\n' .. client)
    notify('c:' .. client, 't' .. field)
  end
end

-- How keys go, and leases with all that stands on them; made where they are needed.
local changed, drop_key, end_lease, reap, tell
