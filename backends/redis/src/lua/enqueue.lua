-- ARGV: line, name, lease, value, depth, '1' to join only an empty line.
-- Answers nothing if the line was not empty, -1 if the lease has ended, or the token and the names ahead.
local function main()
  local line, name, lease = ARGV[1], ARGV[2], ARGV[3]
  local field = line .. '\n' .. name
  local token = call('HGET', H, 'T:' .. field)
  if not token then
    if not alive(lease) then return { -1 } end
    if ARGV[6] == '1' and #call('ZRANGEBYLEX', Z, '[o:' .. line .. '\n', '(o:' .. line .. '\v', 'LIMIT', 0, 1) > 0 then
      return {}
    end
    token = string.format('%016.0f', bump())
    if ARGV[4] == '' then
      call('HSET', H, 'T:' .. field, token)
    else
      call('HSET', H, 'T:' .. field, token, 'P:' .. field, ARGV[4])
    end
    call('ZADD', Z, 0, 'o:' .. line .. '\n' .. token .. '\n' .. name, 0, 'a:' .. lease .. '\nt' .. field)
  end
  return { tonumber(token), ahead(line, token, name, ARGV[5]) }
end
