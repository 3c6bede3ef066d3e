-- ARGV: '1' if a key is put, number of checks, the checks, the writes.
-- Checks: 'a' key · 'u' key modified · 's' ticket token. Writes: 'p' key value lease · 'd' key · 'l' ticket.
-- Answers 1 and the revision if applied, 0 and the revision and the culprit's place if not, -1 and the lease
-- if a lease has ended.
local function main()
  local at = 2
  for check = 1, tonumber(ARGV[2]) do
    local kind, field = ARGV[at + 1], ARGV[at + 2]
    local holds
    if kind == 'a' then
      holds = call('HEXISTS', H, 'K:' .. field) == 0
      at = at + 2
    elseif kind == 'u' then
      local meta = call('HGET', H, 'K:' .. field)
      holds = meta and string.sub(meta, 18, 33) == ARGV[at + 3]
      at = at + 3
    else
      holds = call('HGET', H, 'T:' .. field) == ARGV[at + 3]
      at = at + 3
    end
    if not holds then return { 0, current(), check - 1 } end
  end
  local first = at + 1
  at = first
  while ARGV[at] do
    if ARGV[at] == 'p' then
      local lease = ARGV[at + 3]
      if lease ~= '' and not alive(lease) then return { -1, lease } end
      at = at + 4
    else
      at = at + 2
    end
  end
  at = first
  while ARGV[at] do
    local field = ARGV[at + 1]
    if ARGV[at] == 'p' then
      local value, lease = ARGV[at + 2], ARGV[at + 3]
      local before = call('HGET', H, 'K:' .. field)
      local stamp = string.format('%016.0f', bump())
      local meta = (before and string.sub(before, 1, 16) or stamp) .. ' ' .. stamp .. ' ' .. lease
      call('HSET', H, 'K:' .. field, meta, 'V:' .. field, value)
      local left = before and string.sub(before, 35) or ''
      if not before then call('ZADD', Z, 0, 'i:' .. field) end
      if left ~= lease then
        if left ~= '' then call('ZREM', Z, 'a:' .. left .. '\nk' .. field) end
        if lease ~= '' then call('ZADD', Z, 0, 'a:' .. lease .. '\nk' .. field) end
      end
      changed(field, meta, value)
      at = at + 4
    else
      if ARGV[at] == 'd' then
        local meta = call('HGET', H, 'K:' .. field)
        if meta then drop_key(field, meta) end
      else
        drop_ticket(field)
      end
      at = at + 2
    end
  end
  return { 1, current() }
end
