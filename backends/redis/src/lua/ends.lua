-- How keys go, by themselves or with their lease, and who is told.
local function remaining(lease)
  local deadline = call('ZSCORE', T, 'l:' .. lease)
  if not deadline then return -1 end
  return math.max(tonumber(deadline) - now, 0)
end

-- Changes of keys, by directory, told to watchers at the end of the script in one message each.
local events = {}
function changed(field, mark, meta, value)
  local cut = string.find(field, '\n', 1, true)
  local dir = string.sub(field, 1, cut - 1)
  local list = events[dir]
  if not list then
    -- A directory has a 'D' record exactly while somebody watches it.
    if mark == nil then mark = call('HGET', H, 'D:' .. dir) end
    list = { before = mark, n = 0 }
    events[dir] = list
  end
  list.n = list.n + 1
  -- More would only be cut off again below.
  if list.before and list.n <= 256 then
    list[list.n] = { string.sub(field, cut + 1), meta, value }
  end
end

-- A key's meta: created (16 digits), modified (16 digits), lease.
function drop_key(field, meta, mark)
  call('HDEL', H, 'K:' .. field, 'V:' .. field)
  local lease = string.sub(meta, 35)
  if lease == '' then
    call('ZREM', Z, 'i:' .. field)
  else
    call('ZREM', Z, 'i:' .. field, 'a:' .. lease .. '\nk' .. field)
  end
  bump()
  changed(field, mark)
end

function end_lease(lease)
  call('ZREM', T, 'l:' .. lease)
  call('HDEL', H, 'L:' .. lease)
  -- What is attached is there, unless somebody deleted records by hand; that must not stop everybody else.
  local attached = call('ZRANGEBYLEX', Z, '[a:' .. lease .. '\n', '(a:' .. lease .. '\v')
  for _, member in ipairs(attached) do
    local field = string.sub(member, #lease + 5)
    if string.sub(member, #lease + 4, #lease + 4) == 'k' then
      local meta = call('HGET', H, 'K:' .. field)
      if meta then drop_key(field, meta) else call('ZREM', Z, member) end
    else
      local ticket = call('HMGET', H, 'T:' .. field, 'W:' .. field)
      if ticket[1] then drop_ticket(field, ticket[1], ticket[2]) else call('ZREM', Z, member) end
    end
  end
end

-- A client has not asked again for a minute: it is told no more.
local function forget(wait)
  local field, client = string.sub(wait, 1, -18), string.sub(wait, -16)
  local waiters = call('HGET', H, 'W:' .. field)
  if not waiters then return end
  local left = string.gsub(waiters, client .. ' ', '')
  if left == '' then call('HDEL', H, 'W:' .. field) else call('HSET', H, 'W:' .. field, left) end
end

function reap()
  while #due > 0 do
    for _, timer in ipairs(due) do
      local kind, rest = string.sub(timer, 1, 2), string.sub(timer, 3)
      if kind == 'l:' then
        end_lease(rest)
      else
        call('ZREM', T, timer)
        if kind == 'w:' then
          forget(rest)
        else
          call('HDEL', H, 'D:' .. rest)
          if events[rest] then events[rest].before = false end
        end
      end
    end
    due = call('ZRANGEBYSCORE', T, '-inf', number(now), 'LIMIT', 0, 100)
  end
end

function tell()
  for dir, list in pairs(events) do
    if list.before then
      local count = list.n <= 256 and list.n or 0
      local parts = { number(revision), ' ', list.before, ' ', list.n > 256 and '-1' or number(list.n), '\n' }
      for i = 1, count do
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
